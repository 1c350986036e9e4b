"""Report of a run on one self-contained page, `report.html`."""

from dit_video.reports.contents import Chart, Command, Curve, Figure, Reconstruction, Report, Sample
from dit_video.reports.report import write_report
