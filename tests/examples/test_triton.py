"""examples/config.pbtxt is a configuration of Triton's, and describes the file that its head exports."""

from pathlib import Path

import pytest

import vit
from vit.exporting.runtimes import open_file

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
from google.protobuf import descriptor_pool, message_factory, text_format  # noqa: E402

CONFIG = Path(__file__).parents[2] / "examples" / "config.pbtxt"
# The part of triton-inference-server/common's model_config.proto that the example may use: field -> type; "[]" marks a
# repeated field. Numbers do not matter in text.
MESSAGES = {
    "Input": {"name": "string", "data_type": "DataType", "dims": "int64[]"},
    "Output": {
        "name": "string", "data_type": "DataType", "dims": "int64[]", "label_filename": "string"
    },
    "Batching": {"preferred_batch_size": "int32[]", "max_queue_delay_microseconds": "uint64"},
    "Group": {"name": "string", "kind": "Kind", "count": "int32"},
    "Parameter": {"string_value": "string"},
    "ParametersEntry": {"key": "string", "value": "Parameter"},
    "ModelConfig": {
        "name": "string", "platform": "string", "max_batch_size": "int32", "input": "Input[]",
        "output": "Output[]", "instance_group": "Group[]", "dynamic_batching": "Batching",
        "parameters": "ParametersEntry[]", "backend": "string",
    },
}  # fmt: skip
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_INT64": 9, "TYPE_FP16": 10, "TYPE_FP32": 11},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
}
NUMPY = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_UINT8": "uint8"}


def schema():
    """The class of ModelConfig."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="triton", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (one, kind) in enumerate(fields.items(), start=1):
            many, kind = kind.endswith("[]"), kind.removesuffix("[]")
            added = message.field.add(name=one, number=number, label=3 if many else 1)
            if kind in MESSAGES or kind in ENUMS:
                added.type, added.type_name = 11 if kind in MESSAGES else 14, f".triton.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def fits(port, described) -> bool:
    """Whether an input or output is the file's, with the batch in front and -1 where the file takes any number."""
    kind = described.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[described.data_type].name
    shape = (None, *(None if side == -1 else side for side in described.dims))
    return (port.name, port.dtype, port.shape) == (described.name, NUMPY.get(kind), shape)


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "model.onnx"
    vit.export(vit.load_pretrained("vit_digits_patch4_32"), path)
    session = open_file(path)
    return session.inputs, session.outputs


def test_it_describes_the_file(ports):
    config = text_format.Parse(CONFIG.read_text(), schema()())
    inputs, outputs = ports
    assert len(inputs) == len(config.input) == 1 and fits(inputs[0], config.input[0])
    assert len(outputs) == len(config.output) == 1 and fits(outputs[0], config.output[0])
    assert (config.name, config.backend) == ("digits", "onnxruntime") and config.max_batch_size > 1


@pytest.mark.parametrize(
    ("old", "new"),
    [("images", "pixels"), ("TYPE_FP32", "TYPE_FP16"), ("[ 3, -1, -1 ]", "[ 3, 32, 32 ]"), ("3, -1", "-1, 3")],
)
def test_another_description_does_not_fit(old, new, ports):
    config = text_format.Parse(CONFIG.read_text().replace(old, new), schema()())
    assert not fits(ports[0][0], config.input[0])


def test_a_misspelt_field_is_found():
    with pytest.raises(text_format.ParseError, match="max_batchsize"):
        text_format.Parse(CONFIG.read_text().replace("max_batch_size", "max_batchsize"), schema()())
