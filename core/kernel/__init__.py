"""The kernel's interfaces that Python's standard library lacks: thin typed functions, one module per interface.

Each function does one system call or ioctl and raises `OSError` with the kernel's error number; what that means for a
layer is for the callers to say.
"""
