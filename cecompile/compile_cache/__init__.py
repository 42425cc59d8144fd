"""The compile cache: compiled code for later processes, and the key it is stored under."""
