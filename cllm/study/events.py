"""A report as TensorBoard events, equal bytes each time: TensorBoard's own writer puts the clock into its files."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from cllm.files import write_atomic

_FILE = "events.out.tfevents.0.study"


def scalar(tag: str, value: float, step: int) -> Event:
    """A number at a step."""
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def image(tag: str, png: bytes) -> Event:
    """An encoded picture with 8 bits for each of red, green, blue and alpha."""
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which comes first
    picture = Summary.Image(encoded_image_string=png, height=height, width=width, colorspace=4)
    return Event(summary=Summary(value=[Summary.Value(tag=tag, image=picture)]))


def text(tag: str, markdown: str) -> Event:
    """A text in Markdown."""
    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[markdown.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    value = Summary.Value(tag=f"{tag}/text_summary", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
    return Event(summary=Summary(value=[value]))


def write_events(folder: Path, events: Sequence[Event], wall_time: float) -> Path:
    """Write one file of events into a folder, all with the same time. Returns its path."""
    out = io.BytesIO()
    writer = RecordWriter(out)
    for event in [Event(file_version="brain.Event:2"), *events]:
        event.wall_time = wall_time
        writer.write(event.SerializeToString(deterministic=True))
    path = folder / _FILE
    write_atomic(path, out.getvalue())
    return path
