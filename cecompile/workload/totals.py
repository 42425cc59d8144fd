"""Counts of a run in windows of the questions. Each window has its own plan."""

from dataclasses import dataclass

from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry, Plan

_SUMMED = ("useful_tokens", "unshared_tokens", "question_tree_tokens", "prefix_tree_tokens")


@dataclass(frozen=True, slots=True)
class Totals:
    """The sum of several plans, each for a window of the questions. Windows share no tokens.

    Attributes:
        geometry, decoding: the last plan's.
        bucket_counts: for each bucket, the number of its passes, and of the nodes in their rows.
        useful_tokens, unshared_tokens, question_tree_tokens, prefix_tree_tokens: sums over the plans.
        windows: the number of plans.
    """

    geometry: Geometry
    decoding: DecodeShape | None
    bucket_counts: dict[Bucket, tuple[int, int]]
    useful_tokens: int
    unshared_tokens: int
    question_tree_tokens: int
    prefix_tree_tokens: int
    windows: int

    @classmethod
    def of(cls, plan: Plan) -> "Totals":
        """The totals of a single plan."""
        return cls(plan.geometry, plan.decoding, {}, 0, 0, 0, 0, 0).and_then(plan)

    def and_then(self, plan: Plan) -> "Totals":
        """These totals with one more plan."""
        counts = dict(self.bucket_counts)
        for i, bucket in enumerate(plan.buckets):
            runs, tokens = counts.get(bucket, (0, 0))
            counts[bucket] = runs + plan.runs(i), tokens + plan.useful_tokens_of(i)
        sums = {name: getattr(self, name) + getattr(plan, name) for name in _SUMMED}
        return Totals(plan.geometry, plan.decoding, counts, windows=self.windows + 1, **sums)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets of all plans, largest first."""
        return tuple(sorted(self.bucket_counts, key=lambda b: (-b.slots, b.shape, b.readouts)))

    @property
    def slots(self) -> int:
        return sum(bucket.slots * runs for bucket, (runs, _) in self.bucket_counts.items())

    def runs(self, bucket: int) -> int:
        """See `Plan`."""
        return self.bucket_counts[self.buckets[bucket]][0]

    def useful_tokens_of(self, bucket: int) -> int:
        """See `Plan`."""
        return self.bucket_counts[self.buckets[bucket]][1]
