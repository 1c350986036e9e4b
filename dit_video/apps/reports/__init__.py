"""Report of a run on one self-contained page, `report.html`."""

from dit_video.apps.reports.contents import Chart, Command, Curve, Figure, Reconstruction, Report, Sample
from dit_video.apps.reports.report import write_report
