"""Filter graphs of ffmpeg for decoded frames."""

from fractions import Fraction

import av
from av.filter import Graph


def get_frame_format(frame: av.VideoFrame) -> tuple[int, int, str, int, int]:
    """Return the properties common to all frames of a graph: width, height, format, color matrix and range."""
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range)


def make_filter_graph(frame: av.VideoFrame, *filters: tuple[str, str]) -> Graph:
    """Return a graph of filters, by name and arguments, applied in order to frames of the same format as `frame`."""
    width, height, format, space, color_range = get_frame_format(frame)
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={width}x{height}:pix_fmt={format}:time_base={frame.time_base or Fraction(1, 1000)}"
        f":pixel_aspect=1/1:colorspace={space}:range={color_range}",
    )
    graph.link_nodes(source, *(graph.add(*part) for part in filters), graph.add("buffersink")).configure()
    return graph
