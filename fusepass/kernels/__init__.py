"""Triton kernels and their launchers. Importing a module here needs Triton."""


class KernelUnavailable(RuntimeError):
    """A kernel could not be compiled or loaded: with these sizes, on this GPU or in this installation."""
