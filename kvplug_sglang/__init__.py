"""kvplug for SGLang: ``python -m sglang.launch_server --attention-backend kvplug``.

Importing this module imports no SGLang. SGLang calls ``register`` in every process; nothing
changes for a user who did not select kvplug.
"""


def register() -> None:
    """``sglang.srt.plugins``: give SGLang the backend's name and its flag."""
    from kvplug_sglang import compat

    if not compat.supported():
        compat.warn_unsupported()
        return
    from kvplug_sglang import backend, command_line

    compat.register(command_line.HOOKS, backend.build)
