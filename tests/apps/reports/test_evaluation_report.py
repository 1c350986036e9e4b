"""Page of an evaluation by a protocol."""

from dataclasses import replace

from dit_video.apps.reports.evaluation_report import write_evaluation_report
from dit_video.evaluation.measure import measure
from dit_video.scenes.protocols import PHYSICS_METRICS, PhysicsProtocol
from support.html_page import Page


def test_samples_have_the_labels_of_what_was_judged(tmp_path):
    protocol = PhysicsProtocol(name="physics", metrics=PHYSICS_METRICS, count=2, seed=10**6)
    data = protocol.make_data(None).clips

    def read(number, fps):
        """Return the first scene as it is, and the second one at rest."""
        clip = data.read(number, fps)
        return clip if number == 0 else replace(clip, frames=clip.frames[:1].repeat(len(clip.frames), axis=0))

    samples = data._replace(read=read)
    result = measure(samples, protocol, tmp_path, real_clips=data)
    write_evaluation_report(tmp_path / "report.html", result, title="Laws")
    page = Page((tmp_path / "report.html").read_text())
    assert [a["aria-label"] for a in page.find("li", **{"class": "yes"})] == ["free fall: as prompted"]
    assert [a["aria-label"] for a in page.find("li", **{"class": "no"})] == ["bounce: not as prompted"]
