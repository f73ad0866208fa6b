"""Names of pods: every form, and what is refused."""

import math

import pytest

from mmx.errors import UserError
from mmx.plan.pods import CHIPS, known, parse_pod, wraps

# text -> the pod by topology, devices, hosts
PODS = {
    "v5e:8x8": ("v5e:8x8", 64, 16),
    "v5e:1x1": ("v5e:1x1", 1, 1),
    "v6e:4x8": ("v6e:4x8", 32, 8),
    "v6e:8x4": ("v6e:4x8", 32, 8),
    " V6E:4x8 ": ("v6e:4x8", 32, 8),
    "v5p:2x2x4": ("v5p:2x2x4", 16, 4),
    "v5p:4x2x2": ("v5p:2x2x4", 16, 4),
    "v5p:1x2x2": ("v5p:2x2x1", 4, 1),
    "v5p:8x8x4": ("v5p:4x8x8", 256, 64),
    "v5p:16x16x16": ("v5p:16x16x16", 4096, 1024),
    "v4:2x2x2": ("v4:2x2x2", 8, 2),
    "tpu7x:2x2x2": ("tpu7x:2x2x2", 16, 2),
    "2*v6e:16x16": ("2*v6e:16x16", 512, 128),
    "4 * tpu7x:2x2x1": ("4*tpu7x:2x2x1", 32, 4),
    "h200:1x8": ("h200:1x8", 8, 1),
    "h200:1x2": ("h200:1x2", 2, 1),
    "h200:2x8": ("h200:2x8", 16, 2),
    "2*h200:1x8": ("2*h200:1x8", 16, 2),
    "v6e-1": ("v6e:1x1", 1, 1),
    "v6e-8": ("v6e:2x4", 8, 2),
    "v6e-32": ("v6e:4x8", 32, 8),
    "v6e-256": ("v6e:16x16", 256, 64),
    "v5litepod-64": ("v5e:8x8", 64, 16),
    "v5e-16": ("v5e:4x4", 16, 4),
    "v4-8": ("v4:2x2x1", 4, 1),
    "v5p-8": ("v5p:2x2x1", 4, 1),
    "v5p-32": ("v5p:2x2x4", 16, 4),
    "v5p-128": ("v5p:4x4x4", 64, 16),
    "v5p-640": ("v5p:4x4x20", 320, 80),
    "v5p-1024": ("v5p:8x8x8", 512, 128),
    "v5p-9216": ("v5p:12x16x24", 4608, 1152),
    "tpu7x-16": ("tpu7x:2x2x2", 16, 2),
    "tpu7x-128": ("tpu7x:4x4x4", 128, 16),
    "2*v5p-32": ("2*v5p:2x2x4", 32, 8),
    "ct6e-standard-8t": ("v6e:2x4", 8, 2),
    "ct6e-standard-4t:4x8": ("v6e:4x8", 32, 8),
    "ct5lp-hightpu-1t": ("v5e:1x1", 1, 1),
    "ct5p-hightpu-4t": ("v5p:2x2x1", 4, 1),
    "tpu7x-standard-4t": ("tpu7x:2x2x1", 8, 1),
    "a3-ultragpu-8g": ("h200:1x8", 8, 1),
    "2*a3-ultragpu-8g": ("2*h200:1x8", 16, 2),
    "p5en.48xlarge": ("h200:1x8", 8, 1),
    "Standard_ND96isr_H200_v5": ("h200:1x8", 8, 1),
}


@pytest.mark.parametrize("text, wanted", PODS.items(), ids=PODS)
def test_a_name_gives_its_pod(text, wanted):
    pod = parse_pod(text)
    assert (pod.name, pod.devices, pod.hosts) == wanted
    assert pod.text == text
    assert pod.devices == pod.slices * math.prod(pod.topology) * pod.chip.devices_per_chip
    assert pod.chips * pod.chip.devices_per_chip == pod.devices
    assert parse_pod(pod.name).name == pod.name


# text -> a part of the sentence
REFUSED = {
    "": "unknown", "v6e": "'v6e:4x8'", "v6": "unknown", "v6e:4x8x": "unknown",
    "h100:1x8": "Did you mean 'h200:1x8'", "v6e-standard-4t": "'ct6e-standard-4t'",
    "v5lightpod-64": "'v5litepod-", "0*v6e:4x4": "unknown", "v6e:-2x2": "unknown",
    "v6e:3x4": "whole number of hosts", "v6e:0x4": "whole number of hosts",
    "v6e:4": "1 dimensions", "v6e:2x2x4": "3 dimensions", "v5p:2x2": "2 dimensions",
    "v6e:2x32": "longer than the torus", "v6e:32x32": "at most 256",
    "v5p:2x2x8": "not built", "v5p:2x4x1": "not built", "v5p:4x4x6": "not built",
    "v5p:32x32x32": "at most 8960",
    "v6e-33": "1, 4, 8", "v5p-33": "multiple of 128", "v5p-0": "multiple of 128",
    "tpu7x-3": "multiple of 128", "a3-ultragpu-8g:3": "hosts x GPUs",
    "h200:8": "hosts x GPUs", "h200:2x4": "4 GPUs on each host", "h200:1x16": "up to 8",
    "h200:0x8": "hosts x GPUs", "h200:1000x8": "limit",
}


@pytest.mark.parametrize("text, part", REFUSED.items(), ids=[text or "empty" for text in REFUSED])
def test_other_names_are_refused_in_a_sentence(text, part):
    with pytest.raises(UserError) as refusal:
        parse_pod(text)
    assert part in str(refusal.value)
    assert refusal.value.rule


def test_unknown_names_hear_what_is_known():
    with pytest.raises(UserError) as refusal:
        parse_pod("b200:1x8")
    assert all(name in str(refusal.value) for name in (*CHIPS, "a3-ultragpu-8g", "v5litepod-N"))


def test_every_name_offered_is_taken():
    assert len(known()) > 20
    for name in known():
        parse_pod(name)


def test_memory_is_the_compilers_limit():
    limits = {name: chip.hbm_gib for name, chip in CHIPS.items()}
    assert limits == {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74,
                      "h200": 134.0}
    h200 = CHIPS["h200"]
    assert h200.hbm_gib + h200.headroom_gib == 139.0


@pytest.mark.parametrize("chip, topology, joined", [
    ("v6e", (4, 16), (False, True)), ("v5e", (8, 8), (False, False)),
    ("v5p", (2, 4, 4), (False,) * 3), ("v5p", (4, 4, 8), (True,) * 3),
    ("h200", (1, 8), (False,) * 2),
])
def test_ends_of_a_torus(chip, topology, joined):
    assert wraps(CHIPS[chip], topology) == joined
