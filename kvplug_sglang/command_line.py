"""What every SGLang process carries, selected or not: the flag, and two places to look for it."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import cache
from typing import Any

from kvplug.config import ENVIRONMENT, stand_in
from kvplug_sglang import compat
from kvplug_sglang.settings import FLAG, NAME, Engine, given, remember

log = logging.getLogger("sglang.kvplug")


def add_flag(result: None, parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        FLAG,
        type=str,
        default=None,
        help="Policy line of --attention-backend kvplug, such as 'snapkv(budget=1024) + "
        "quest(budget=512)', or a JSON object of its settings. Also: KVPLUG_POLICY.",
    )


def read_flag(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ServerArgs.from_cli_args``: the flag is no field of SGLang's arguments."""
    namespace = kwargs.get("args", args[-1])
    line = getattr(namespace, "kvplug_policy", None)
    if line is not None:
        server_args = original(*args, **kwargs)
        if not compat.selected(server_args):
            raise ValueError(f"{FLAG} needs --attention-backend {NAME}; add it, or drop the flag")
        remember(line)
        return server_args
    return original(*args, **kwargs)


def decide_graphs(server_args: Any) -> None:
    """Before SGLang sizes memory."""
    if compat.selected(server_args):
        from kvplug_sglang.graph_memory import decide

        decide(server_args)


def reserve_graphs(original: Any, server_args: Any) -> float:
    """Around what SGLang leaves free for graphs, in MiB."""
    reserved: float = original(server_args)
    if compat.selected(server_args):
        from kvplug_sglang.graph_memory import reserve

        reserved += reserve(server_args)
    return reserved


def name_backend(original: Any, server_args: Any) -> None:
    """Around what SGLang decides by the model's name, some of whose models it serves over
    attention backends that it knows by name alone: it is told which one kvplug wraps."""
    if not compat.selected(server_args):
        original(server_args)
        return
    from kvplug_sglang.backend import stock

    wrapped = stock(server_args, compat.view(server_args).device)
    try:
        with compat.named(server_args, wrapped):
            original(server_args)
    except AssertionError as error:
        if "attention backend" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"kvplug cannot serve this configuration:\n- {compat.BY_NAME.format(wrapped)} "
            f"({said}); serve it without --attention-backend kvplug"
        ) from error


def settle(result: None, server_args: Any) -> None:
    """While SGLang resolves its arguments: refuse what would be wrong, choose what is open."""
    if compat.selected(server_args):
        from kvplug_sglang.refusals import refuse

        decisions = refuse(server_args, given())
        if "page_size" in decisions:
            log.info("kvplug: --page-size %d, as the policy selects pages", decisions["page_size"])
        if "max_running_requests" in decisions:
            log.info(
                "kvplug: --max-running-requests %d, as each fills a page in full precision",
                decisions["max_running_requests"],
            )
        compat.declare(server_args, decisions)
    elif (line := stand_in()) is not None:
        _say_without_effect(line)


@cache
def _say_without_effect(line: str) -> None:
    log.warning(
        "kvplug: without effect: %s=%s needs --attention-backend %s", ENVIRONMENT, line, NAME
    )


def serve(original: Any, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``Scheduler.__init__``, in each rank's process: hooks before it, checks behind."""
    from kvplug_sglang import doctor, hooks

    if not compat.selected(server_args):
        Engine.current = None
        original(self, server_args, *args, **kwargs)
        return
    try:
        hooks.enter(server_args)
        original(self, server_args, *args, **kwargs)
        compat.verify((*HOOKS, *hooks.HOOKS))
        doctor.examine(self)
    except RuntimeError as error:
        # SGLang's launcher takes a scheduler that exits for dead, and stops the server.
        sys.exit(str(error))


HOOKS = (
    compat.Hook("sglang.srt.server_args.ServerArgs.add_cli_args", "after", add_flag, ("parser",)),
    compat.Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args", "around", read_flag, ("cls", "args")
    ),
    compat.Hook(
        "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
        "around",
        name_backend,
        ("server_args",),
    ),
    compat.Hook(
        "sglang.srt.arg_groups.memory_hook.handle_gpu_memory_settings",
        "before",
        decide_graphs,
        ("server_args",),
    ),
    compat.Hook(
        "sglang.srt.arg_groups.memory_hook.reserve_for_graph_mb",
        "around",
        reserve_graphs,
        ("server_args",),
    ),
    compat.Hook(
        "sglang.srt.arg_groups.attention_hook.handle_attention_backend_compatibility",
        "after",
        settle,
        ("server_args",),
    ),
    compat.Hook(
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "around",
        serve,
        ("self", "server_args", "port_args"),
    ),
)
