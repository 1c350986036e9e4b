"""Render scenes whose truth is known into a folder of clips with captions."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path

from dit_video import scenes
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import script
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress


def main(
    out: Path,
    count: int = 6000,
    seed: int = 0,
    levels: tuple[int, ...] = (1, 2),
    frames: tuple[int, ...] = (1, 9, 17),
    sides: tuple[tuple[int, int], ...] = scenes.SIDES,
    kind: scenes.SceneKind = "levels",
    depth: Path | None = None,
    actions: Path | None = None,
) -> None:
    """Render scenes whose truth is known into a folder of clips with captions.

    For example:

        python tools/render_scenes.py --out runs/scenes/clips
        python tools/render_scenes.py --out scenes --count 300 --levels 1 2 3 --frames 17

    After an interruption, run the same command again to continue.

    Args:
        out: Folder to write: clips/, metadata.csv with their captions, scenes.jsonl with what they hold.
        count: Number of scenes.
        seed: Seed of the scenes.
        levels: Levels of the scenes, in turn: 1 one object, 2 two objects, 3 several with physics and a camera.
        frames: Numbers of frames of the clips; each clip has one of them at random, repeated ones more often.
        sides: Heights and widths of the clips, such as 48 80 64 64 for two, from which each clip has one likewise.
        kind: Scenes of the levels, loops of one object, whose last frame is as the first, or an object that is steered.
        depth: Folder for the depth of each clip, in files of the same names, which trains a model that is controlled.
        actions: Folder for the actions of each clip of a steered object, in NAME_OF_THE_CLIP.npy.
    """
    check_minimum(1, count=count, frames=min(frames, default=0))
    check_minimum(0, seed=seed)
    sizes = [Grid(length, *each) for length in frames for each in sides]
    with Progress("rendering scenes", count, unit="clip") as progress:
        scenes.write_folder(
            out,
            count=count,
            seed=seed,
            levels=levels,
            sizes=sizes,
            kind=kind,
            depth=depth,
            actions=actions,
            progress=lambda done, _: progress.update(done),
        )
    print(f"{count} clips in {out}")


if __name__ == "__main__":
    script(parse_arguments)(main)
