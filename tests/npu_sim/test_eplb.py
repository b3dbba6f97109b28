"""Experts that vLLM Ascend moves while an instance is a source."""

import json
import re


def test_an_offer_is_withdrawn_before_maps_and_weights_of_experts_change(simulator):
    output = simulator.run("eplb.py").check().output
    told = [json.loads(line) for line in re.findall(r'^\{"step".*$', output, re.MULTILINE)]
    assert [(one["step"], one["state"]) for one in told] == [
        ("before", "serving"),
        ("map", "changing"),
        ("log2phy", "cannot_serve"),
        ("weight", "cannot_serve"),
        ("after", "cannot_serve"),
    ]
    assert told[-1]["reason"] == "EPLB has moved experts"
