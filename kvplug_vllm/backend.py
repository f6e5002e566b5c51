"""The class behind ``--attention-backend kvplug``: the device's stock backend plus a policy."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from kvplug_vllm.cpu import KVPlugBackend
else:
    from kvplug_vllm.cuda import KVPlugBackend

__all__ = ["KVPlugBackend"]
