"""A sharded model gives the same responses."""

import json

import pytest
from fake_devices import run_on_eight_devices

pytestmark = pytest.mark.backend_free

PROGRAM = """
import json
import keras
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model
import keras_openllama.evaluation
from keras_openllama import OpenLlamaBackbone
from keras_openllama.distribution import OpenLlamaParallel, make_mesh

devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"], devices)
layout = OpenLlamaBackbone.get_layout_map(mesh)
distributions = {
    "one device": None,
    "2 x 2 x 2": OpenLlamaParallel(make_mesh(data=2, fsdp=2, model=2)),
    "KerasHub's": keras.distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch"
    ),
    "data": keras.distribution.DataParallel(devices=devices),
}
shape = TinyShape("tiny", 4, 2, 16, hidden_dim=64, intermediate_dim=96, context=128)
pairs = [(f"{i} the value", f" of {w}") for i in range(9) for w in ("x", "an item")]
prompts = [("The value", {"max_gen_toks": 5, "until": []})]
for name, distribution in distributions.items():
    keras.distribution.set_distribution(distribution)
    model = get_model("keras_openllama")(
        lm=random_lm(shape, trained_model(keep_spaces=True)), batch_size=2
    )
    found = {}
    for kind, args in (("loglikelihood", pairs), ("generate_until", prompts)):
        requests = [Instance(kind, {}, arguments, 0) for arguments in args]
        found[kind] = getattr(model, kind)(requests)
    print(json.dumps([name, found]))
"""


def test_responses_do_not_depend_on_the_distribution():
    found = dict(map(json.loads, run_on_eight_devices(PROGRAM).splitlines()))
    expected = found.pop("one device")
    assert len(found) == 3
    for name, responses in found.items():
        assert responses["generate_until"] == expected["generate_until"], name
        for (value, flag), (other, other_flag) in zip(
            responses["loglikelihood"], expected["loglikelihood"], strict=True
        ):
            assert value == pytest.approx(other, abs=1e-4), name
            assert flag == other_flag, name
