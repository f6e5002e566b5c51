"""SGLang's own attention kit against ``kvplug``. Prints what each case did, as JSON."""

import json
import sys
import unittest

import torch

import kvplug_sglang
from kvplug_sglang.attention import PlannedAttention


def main(policies: list[str]) -> None:
    kvplug_sglang.register()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    from kvplug_sglang.settings import Engine, remember

    torch.set_grad_enabled(False)
    selected: list[int] = []
    plain = PlannedAttention._selected

    def count(self, *args):
        selected.append(len(args[2].tokens))
        plain(self, *args)

    PlannedAttention._selected = count
    done = {}
    for policy in policies:
        remember(policy)
        Engine.current = None
        for case in kit.make_dense_cases("kvplug"):
            selected.clear()
            kit.run_dense_attention_case(
                unittest.TestCase(), case, device="cpu", dtype=torch.float32
            )
            done[f"{policy} {case.name}"] = sum(selected)
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1:])
