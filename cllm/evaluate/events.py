"""A picture and a text as TensorBoard events, written without torch."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write_events(folder: Path, tag: str, png: bytes, text: str, *, suffix: str) -> None:
    """Write one file of events into `folder`, its name ending in `suffix`: `tag` in the tabs Images and Text.

    Args:
        folder: folder of the file.
        tag: name of the picture and of the text.
        png: an encoded picture with 8 bits for each of red, green, blue and alpha.
        text: Markdown.
        suffix: end of the file's name.
    """
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which comes first
    image = Summary.Image(encoded_image_string=png, height=height, width=width, colorspace=4)
    plugin = SummaryMetadata.PluginData(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    words = Summary.Value(tag=f"{tag}/text_summary", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for value in (Summary.Value(tag=tag, image=image), words):
        writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))
    writer.close()
