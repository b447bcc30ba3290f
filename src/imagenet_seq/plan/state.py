"""The state of a run: where it is, and what must be the same to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from imagenet_seq.errors import StateError
from imagenet_seq.index.columns import Index
from imagenet_seq.plan.epoch import Order

# ---- state ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A place in a run, from which any number of ranks continues with exactly the rest.

    Args:
        index_id: `Index.id` of the dataset.
        pillow: rule whose pixels are matched.
        epoch: number of the epoch.
        samples_done: samples of the epoch that all ranks together have had.
        shuffle: see `Order`, or another word for an order given from outside.
        seed: see `Order`.
        block_bytes: see `Order`.
        shuffle_blocks: see `Order`.
        num_streams: see `Order`.
        exact: see `Order`.
        format_version: of the state itself.
    """

    index_id: str
    pillow: str
    epoch: int
    samples_done: int
    shuffle: str
    seed: int
    block_bytes: int
    shuffle_blocks: int
    num_streams: int
    exact: bool
    format_version: int = 2

    @classmethod
    def of(cls, index: Index, order: Order, pillow: str, epoch: int, samples_done: int) -> State:
        """Make the state of a run at a place."""
        return cls(index.id, pillow, epoch, samples_done, **asdict(order))

    @property
    def order(self) -> Order:
        """What decides the order of the run that was saved."""
        return Order(**{field.name: getattr(self, field.name) for field in fields(Order)})

    def to_dict(self) -> dict[str, Any]:
        """Return the state as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> State:
        """Read what `to_dict` gave.

        Raises:
            StateError: where it is something else, or of another format version.
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
"""What a loader takes over from a state, whatever it had itself."""


_REMEDIES = {
    "index_id": "open the dataset that the state was saved with",
    "format_version": "use the version of imagenet-seq that saved it",
}


def check_state(expected: State, got: State) -> None:
    """Refuse a saved state that does not fit.

    Args:
        expected: the loader's own state; its place and num_streams don't matter, as those are
            taken over from the saved one.
        got: the saved state.

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
