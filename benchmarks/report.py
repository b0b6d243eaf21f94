"""The report of a benchmark: a figure, the figure it is compared with, and whether it reaches its target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    claim: str
    measured: str
    against: str
    ratio: float
    target: str  # such as ">= 0.40", of the ratio

    @property
    def met(self) -> bool:
        sign, _, limit = self.target.partition(" ")
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)

    def line(self) -> str:
        met = "yes" if self.met else "**no**"
        return f"| {self.claim} | {self.measured} | {self.against} | {self.ratio:.2f} | {self.target} | {met} |"


HEADER = "| claim | measured | against | ratio | target | met |\n|---|---|---|---|---|---|"
