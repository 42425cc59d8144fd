"""The compile cache: compiled code for later processes, and the key under which code is stored."""
