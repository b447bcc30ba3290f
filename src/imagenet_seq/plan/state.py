"""The state of a run: its position, and the settings that must be the same to continue it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from imagenet_seq.errors import StateError
from imagenet_seq.index.columns import Index
from imagenet_seq.plan.order import Order


@dataclass(frozen=True)
class State:
    """A position in a run, from which any number of ranks delivers exactly the rest."""

    index_id: str
    pillow: str  # whose resize rule is followed
    epoch: int
    samples_done: int  # over all ranks
    shuffle: str  # this and those below: see `Order`
    seed: int
    block_bytes: int
    shuffle_blocks: int
    num_streams: int
    exact: bool
    format_version: int = 2  # of the state itself

    @classmethod
    def of(cls, index: Index, order: Order, pillow: str, epoch: int, samples_done: int) -> State:
        """Make the state of a run at a position."""
        return cls(index.id, pillow, epoch, samples_done, **asdict(order))

    @property
    def order(self) -> Order:
        """Settings of the order of the saved run."""
        return Order(**{field.name: getattr(self, field.name) for field in fields(Order)})

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> State:
        """Read the result of `to_dict`.

        Raises:
            StateError: not a state, or one of another format version.
        """
        version = values.get("format_version")
        if version != cls.format_version:
            raise StateError(
                f"loader state: expected format version {cls.format_version}, got {version!r}; "
                "load it with the version of imagenet-seq that saved it"
            )
        expected = {field.name: field.type for field in fields(cls)}
        wrong = [
            f"{name}: expected {type_name}, got {values.get(name, 'nothing')!r}"
            for name, type_name in expected.items()
            if type(values.get(name)).__name__ != type_name
        ]
        wrong += [f"{name}: unknown" for name in values if name not in expected]
        if wrong:
            raise StateError("loader state: " + "; ".join(wrong))
        return cls(**values)


_ADOPTED = ("epoch", "samples_done", "num_streams")
"""Fields that a loader takes over from a saved state."""

_REMEDIES = {
    "index_id": "open the dataset that the state was saved with",
    "format_version": "use the version of imagenet-seq that saved it",
}


def check_state(expected: State, got: State) -> None:
    """Refuse a saved state of another run than the loader's own, `expected`.

    Position and num_streams may differ: they are taken over from the saved one.

    Raises:
        StateError: naming everything that differs.
    """
    differences = [
        f"  {field.name}: expected {expected_value!r}, got {got_value!r}; "
        + _REMEDIES.get(field.name, f"pass {field.name}={got_value!r}")
        for field in fields(State)
        if field.name not in _ADOPTED
        and (expected_value := getattr(expected, field.name))
        != (got_value := getattr(got, field.name))
    ]
    if differences:
        raise StateError(
            "the saved state is of another run, and would not continue it exactly:\n"
            + "\n".join(differences)
        )
