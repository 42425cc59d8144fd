"""What the plans of several windows of the questions count together."""

from dataclasses import dataclass

from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry, Plan


@dataclass(frozen=True, slots=True)
class Totals:
    """What several plans count together, each of a window of the questions: nothing is shared between windows.

    Attributes:
        geometry, decoding: the last plan's.
        bucket_counts: of each bucket how often it runs, and the nodes in the rows of its passes.
        useful_tokens, unshared_tokens, question_tree_tokens, prefix_tree_tokens: sums of the plans' own.
        windows: how many plans.
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
        """A single plan's."""
        counts = {bucket: (plan.runs(i), plan.useful_tokens_of(i)) for i, bucket in enumerate(plan.buckets)}
        return cls(
            plan.geometry,
            plan.decoding,
            counts,
            plan.useful_tokens,
            plan.unshared_tokens,
            plan.question_tree_tokens,
            plan.prefix_tree_tokens,
            1,
        )

    def and_then(self, plan: Plan) -> "Totals":
        """With one more plan."""
        other, counts = Totals.of(plan), dict(self.bucket_counts)
        for bucket, (runs, tokens) in other.bucket_counts.items():
            before = counts.get(bucket, (0, 0))
            counts[bucket] = before[0] + runs, before[1] + tokens
        return Totals(
            plan.geometry,
            plan.decoding,
            counts,
            self.useful_tokens + other.useful_tokens,
            self.unshared_tokens + other.unshared_tokens,
            self.question_tree_tokens + other.question_tree_tokens,
            self.prefix_tree_tokens + other.prefix_tree_tokens,
            self.windows + 1,
        )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All that any plan has, largest first."""
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
