"""Every message of every version is read by this one, and says what it said."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
import pytest

from protocol.framing import decode_value, encode_value, unpack_value
from protocol.version import OLDEST_VERSION, PROTOCOL_VERSION
from tests.protocol.make_samples import Samples, fields_in, messages, path_of

MESSAGES: Final = messages()
VERSIONS: Final = range(OLDEST_VERSION, PROTOCOL_VERSION + 1)


def samples_of(version: int) -> Samples:
    samples: Samples = json.loads(path_of(version).read_text())
    return samples


ALL: Final = [
    pytest.param(name, bytes.fromhex(sample), id=f"v{version}-{name}-{number}")
    for version in VERSIONS
    for name, samples in samples_of(version).items()
    for number, sample in enumerate(samples)
]


def says(old: Any, new: Any) -> bool:
    """Whether ``new`` says all that ``old`` said; it may say more."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and says(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(says, old, new))
    return bool(old == new) and type(old) is type(new)


@pytest.mark.parametrize(("name", "sample"), ALL)
def test_a_sample_is_read_and_loses_nothing(name: str, sample: bytes) -> None:
    assert name in MESSAGES, f"{name} is gone, and peers of an older version still send it"
    message = decode_value(sample, MESSAGES[name], name)
    assert says(unpack_value(sample), unpack_value(encode_value(message)))


@pytest.mark.parametrize(("name", "sample"), ALL)
def test_fields_of_a_later_version_are_passed_over(name: str, sample: bytes) -> None:
    later = unpack_value(sample)
    if isinstance(later, dict):
        later["zz_added_later"] = {"deep": [1, {"x": None}]}
    else:
        later.append({"added": "later"})
    assert decode_value(encode_value(later), MESSAGES[name], name) == decode_value(
        sample, MESSAGES[name], name
    )


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_of_every_message_is_in_a_sample(name: str) -> None:
    kind = MESSAGES[name]
    there = samples_of(PROTOCOL_VERSION).get(name, [])
    seen = {field for one in there for field in fields_in(kind, bytes.fromhex(one))}
    missing = {field.encode_name for field in msgspec.structs.fields(kind)} - seen
    say = "run: python -m tests.protocol.make_samples"
    assert there, f"{name} has no sample; {say}"
    assert not missing, f"no sample of {name} has {missing}; {say}"


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_not_required_may_be_left_out(name: str) -> None:
    """A peer of an older version sends only what was there then; from the first day: these."""
    kind = MESSAGES[name]
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    for sample in map(bytes.fromhex, samples_of(OLDEST_VERSION).get(name, [])[:1]):
        plain = unpack_value(sample)
        if isinstance(plain, dict):
            oldest = {
                key: value
                for key, value in plain.items()
                if key in required or key == kind.__struct_config__.tag_field
            }
            decode_value(encode_value(oldest), kind, name)
