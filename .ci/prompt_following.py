"""Check the pooled metrics of several quickstart runs.

    python .ci/prompt_following.py [--config unet] RUN [RUN ...]

It reads the sample files of every run and evaluates them again, so that the result depends on nothing but pixels. It
fails if a rate or the spread of start positions is below its bound.
"""

import argparse
import sys
from pathlib import Path

from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.scenes.shape_metrics import PromptFollowing, StartSpread

MIN_RATES = {
    "quickstart": {"colour": 0.95, "direction": 0.85, "shape": 0.60},
    "unet": {"colour": 0.90, "direction": 0.75, "shape": 0.50},
}
MIN_SPREAD = {"quickstart": 0.80, "unet": 0.0}


def main(config: str, runs: list[Path]) -> None:
    metrics, rates = (PromptFollowing(), StartSpread()), {name: [] for name in MIN_RATES[config]}
    pooled = [metric.init() for metric in metrics]
    for run in runs:
        samples = open_clip_set(run / "samples")
        clips = [samples.read(number, None) for number in range(len(samples.names))]
        batch = MetricBatch(samples=clips, prompts=samples.captions)
        states = [metric.update(metric.init(), batch) for metric in metrics]
        estimates = metrics[0].compute(states[0])
        for name, values in rates.items():
            values.append(estimates[name].value)
        print(f"{run}: " + ", ".join(f"{name} {values[-1]:.1%}" for name, values in rates.items()))
        pooled = [metric.merge(*pair) for metric, *pair in zip(metrics, pooled, states, strict=True)]
    ratios = []
    for metric, state in zip(metrics, pooled, strict=True):
        descriptions = metric.describe()
        for name, estimate in metric.compute(state).items():
            if estimate.value is not None:
                bounds = [descriptions[name].format_value(bound) for bound in estimate.interval or ()]
                interval = f"95 % interval {' to '.join(bounds)}, " if bounds else ""
                text = descriptions[name].format_value(estimate.value)
                print(f"{descriptions[name].label}: {text} ({interval}{estimate.count} samples)")
            if name.startswith("start_spread_") and "image" not in name:
                ratios.append(estimate.value)
    below = [name for name, bound in MIN_RATES[config].items() if sum(rates[name]) / len(runs) < bound]
    if below or min(ratios) < MIN_SPREAD[config]:
        sys.exit(f"error: below the required bounds: {', '.join(below) or 'spread of starts'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=MIN_RATES, default="quickstart", help="config of the runs")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of the runs")
    main(**vars(parser.parse_args()))
