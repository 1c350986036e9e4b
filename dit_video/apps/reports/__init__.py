"""Report of a run on one self-contained page, `report.html`."""

from dit_video.apps.reports.elements import Chart, Curve
from dit_video.apps.reports.report import Command, Figure, Reconstruction, Report, Sample, write_report
