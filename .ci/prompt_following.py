"""Check the pooled metrics of several quickstart runs.

    python .ci/prompt_following.py RUN [RUN ...]

It reads the sample files of every run and evaluates them again, so that the result depends on nothing but pixels. It
fails if a rate or the spread of start positions is below its bound.
"""

import sys
from pathlib import Path

from dit_video.data.synthetic import shapes
from dit_video.evaluation import evaluate
from dit_video.evaluation.metrics.prompt_following import prompt_following

MIN_RATES = {"colour": 0.95, "direction": 0.85, "shape": 0.60}
MIN_SPREAD = 0.80


def main(runs: list[Path]) -> None:
    results, rates = [], {name: [] for name in MIN_RATES}
    for run in runs:
        run_results = evaluate.judge_samples(evaluate.read_samples(run / "samples"))
        table = prompt_following(run_results)["all"]
        for name in MIN_RATES:
            rates[name].append(table[name]["rate"])
        print(f"{run}: " + ", ".join(f"{name} {table[name]['rate']:.1%}" for name in MIN_RATES))
        results += run_results
    pooled = prompt_following(results)
    for group in ("all", "seen", "never_seen", "images"):
        for name, figure in pooled[group].items():
            if figure["rate"] is not None:
                interval = f"{figure['low']:.1%} to {figure['high']:.1%}"
                print(f"{group} {name}: {figure['rate']:.1%} (95 % interval {interval}, {figure['count']} samples)")
    for direction in shapes.DIRECTIONS:
        axes = pooled["start_spread"][direction]
        print(
            f"spread of starts, {direction}: "
            + ", ".join(f"{a} {axes[a]['ratio']:.2f}" for a in ("vertical", "horizontal"))
        )
    below = [name for name, bound in MIN_RATES.items() if sum(rates[name]) / len(runs) < bound]
    ratios = [pooled["start_spread"][d][a]["ratio"] for d in shapes.DIRECTIONS for a in ("vertical", "horizontal")]
    if below or min(ratios) < MIN_SPREAD:
        sys.exit(f"error: below the required bounds: {', '.join(below) or 'spread of starts'}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
