"""The autograd functions behind the operations, one idea a file."""
