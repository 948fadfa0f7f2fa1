"""Errors whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input. The message says what is wrong and what to do; the command line exits with code 2."""


class BusyError(UserError):
    """Too many requests wait already. The message says how many; whoever asked may try again later."""


class GenerationError(RuntimeError):
    """The model produced no usable logits. The message names the module; the command line exits with code 1."""
