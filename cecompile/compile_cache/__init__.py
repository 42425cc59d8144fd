"""Compiled code that later processes may run: where it is kept, and under which key."""
