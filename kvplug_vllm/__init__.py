"""kvplug for vLLM: ``vllm serve MODEL --attention-backend kvplug``.

Importing this module imports no vLLM. vLLM calls the two functions below, in every process and
possibly more than once; both change nothing for a user who did not select kvplug.
"""

from typing import Any

_BACKEND = "kvplug_vllm.backend.KVPlugBackend"


def register() -> None:
    """``vllm.general_plugins``: give vLLM's backend list the name KVPLUG."""
    from kvplug_vllm import compat

    if not compat.supported():
        compat.warn_unsupported()
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvplug_vllm.counters import Files
    from kvplug_vllm.settings import NAME

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, _BACKEND)
        # An enum pickles by value, and a spawned worker unpickles its config before plugins
        # load: the member must bring its own registration along.
        AttentionBackendEnum[NAME].__reduce_ex__ = _reduce
    compat.honour_selection()
    compat.announce_configurations(_configured)
    Files.register()


def _configured(vllm_config: Any) -> None:
    """vLLM has made a configuration: refuse what would be wrong before anything loads."""
    from vllm.logger import init_logger

    from kvplug_vllm import host_settings
    from kvplug_vllm.settings import Engine, resolve, selected, without_effect

    if Engine.serves(vllm_config):
        return
    log = init_logger("vllm.kvplug")
    for line in without_effect(vllm_config):
        log.warning_once("kvplug: without effect: %s", line)
    if host_settings.chosen(vllm_config) is not None and not selected(vllm_config):
        raise ValueError(
            f"{host_settings.SPEC} writes pages through kvplug's layers; add --attention-backend "
            "kvplug (the policy 'dense' leaves attention as it is), or use vLLM's "
            "CPUOffloadingSpec"
        )
    if selected(vllm_config):
        from kvplug_vllm.admission import judge_requests, judge_sessions_and_beams
        from kvplug_vllm.refusals import refuse
        from kvplug_vllm.router import follow_drafts

        refuse(vllm_config)
        resolve(vllm_config)
        host_settings.tell(vllm_config)
        follow_drafts()
        judge_requests()
        judge_sessions_and_beams()


def _reduce(protocol: Any) -> tuple[Any, tuple[str]]:
    from kvplug_vllm.counters import Meeting

    return restore, (Meeting.invite(),)


def restore(counters: str) -> Any:
    """Unpickle the backend's enum member in a process that has not loaded plugins yet, and count
    in the folder of the process that sent it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvplug_vllm.admission import judge_requests
    from kvplug_vllm.counters import Meeting
    from kvplug_vllm.router import follow_drafts
    from kvplug_vllm.settings import NAME

    register()
    Meeting.join(counters)
    follow_drafts()
    judge_requests()
    return AttentionBackendEnum[NAME]


def platform() -> str | None:
    """``vllm.platform_plugins``: a CPU platform that honours the choice of KVPLUG.

    vLLM's own CPU platform ignores ``--attention-backend``. Inactive on every other device, and
    where another out-of-tree platform is installed: vLLM allows one.
    """
    from importlib.metadata import entry_points

    from vllm.platforms import cpu_platform_plugin

    from kvplug_vllm import compat

    ours = f"{__name__}:{platform.__name__}"
    if not compat.supported():
        return None
    if any(entry.value != ours for entry in entry_points(group="vllm.platform_plugins")):
        return None
    return "kvplug_vllm.cpu_platform.KVPlugCpuPlatform" if cpu_platform_plugin() else None
