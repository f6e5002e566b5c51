"""What SGLang's adapter hands the core: settings, numbers of the model, packed pages' digests."""

from __future__ import annotations

import json

import pytest

from tests import handover

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def handed(engine, random_llama, prompts):
    from kvplug_sglang import attention, compression

    handed = handover.Handed()
    with pytest.MonkeyPatch.context() as patch, engine(
        random_llama(), json.dumps(handover.SETTINGS)
    ) as planned:  # fmt: skip
        handed.listen(patch, attention, compression)
        pack = attention.PlannedAttention._pack

        def noted(backend, layer, packing):
            digests = backend.digests.of_layer(layer.layer_id)
            digests[packing.targets // backend.engine.page_size] = handover.STALE
            pack(backend, layer, packing)
            handed.note(digests, packing.targets)

        patch.setattr(attention.PlannedAttention, "_pack", noted)
        planned.generate(prompts(*handover.LENGTHS), 4)
    return handed


@pytest.mark.parametrize(
    "check",
    [
        handover.check_min_context,
        handover.check_protect,
        handover.check_scale,
        handover.check_digests,
    ],
)
def test_what_the_core_is_handed(handed, check):
    check(handed)
