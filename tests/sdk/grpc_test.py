"""A gRPC client that knows nothing but an address: everything it calls, it learns through reflection."""

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

WAIT_S = 120


@pytest.fixture(scope="module")
def channel(grpc_target):
    with grpc.insecure_channel(grpc_target) as channel:
        yield channel


class Reflected:
    """Calls any method of a server by name, with messages given and returned as reflected types."""

    def __init__(self, channel, key=None):
        self.channel = channel
        self.metadata = [("authorization", f"Bearer {key}")] if key else []
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self.database)

    def services(self):
        return set(self.database.get_services())

    def message(self, name, **fields):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def call(self, service, method, request):
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        response = message_factory.GetMessageClass(descriptor.output_type)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        stub = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        request_type = message_factory.GetMessageClass(descriptor.input_type)
        return stub(request_type(**request), metadata=self.metadata, timeout=WAIT_S)

    def enum(self, message, field):
        """The name of an enum field's value."""
        descriptor = message.DESCRIPTOR.fields_by_name[field]
        return descriptor.enum_type.values_by_number[getattr(message, field)].name


@pytest.fixture(scope="module")
def server(channel, api_key):
    return Reflected(channel, api_key)


def parameters(model, **changes):
    return {
        "model": model,
        "messages": [{"role": "ROLE_USER", "content": "Tell me a short story about a river."}],
        "output_tokens_max": 24,
        "temperature": 0.0,
    } | changes


def details_of(error: grpc.RpcError) -> dict:
    """The google.rpc details of a failure, by the short name of their type."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no google.rpc.Status in {error}"
    found = {}
    for packed in status.details:
        name = packed.type_url.split("/")[-1]
        assert name.startswith("google.rpc."), name
        detail = getattr(error_details_pb2, name.removeprefix("google.rpc."))()
        assert packed.Unpack(detail)
        found[name.removeprefix("google.rpc.")] = detail
    return found


def refusal(server, request, method="CreateChatCompletion"):
    with pytest.raises(grpc.RpcError) as caught:
        answer = server.call("sluice.v1.ChatService", method, {"parameters": request})
        if method == "StreamChatCompletion":
            list(answer)
    return caught.value


def test_reflection_lists_the_public_services_and_no_others(server):
    assert server.services() >= {
        "sluice.v1.ChatService",
        "sluice.v1.ModelService",
        "grpc.health.v1.Health",
    }
    assert not [name for name in server.services() if name.startswith("sluice.node.")]


def test_reflection_v1_answers_as_v1alpha_does(channel, server):
    """The two versions share their wire format; only the service's name differs."""
    listing = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answer = next(listing(asked, timeout=WAIT_S))
    assert {service.name for service in answer.list_services_response.service} == server.services()


def test_health(server):
    for service in ("", "sluice.v1.ChatService"):
        answer = server.call("grpc.health.v1.Health", "Check", {"service": service})
        assert server.enum(answer, "status") == "SERVING", service
    with pytest.raises(grpc.RpcError) as caught:
        server.call("grpc.health.v1.Health", "Check", {"service": "no.such.Service"})
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_models(server, model):
    listed = server.call("sluice.v1.ModelService", "ListModels", {}).models
    assert [entry.name for entry in listed] == [model]
    assert listed[0].context_tokens_max > 0 and listed[0].created_s > 0
    assert server.call("sluice.v1.ModelService", "GetModel", {"name": model}).model == listed[0]
    with pytest.raises(grpc.RpcError) as caught:
        server.call("sluice.v1.ModelService", "GetModel", {"name": "no-such-model"})
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_unary_and_streamed_answers_are_the_same(server, model):
    whole = server.call("sluice.v1.ChatService", "CreateChatCompletion", {"parameters": parameters(model)})
    assert whole.model == model and whole.id and whole.created_s > 0
    assert server.enum(whole.message, "role") == "ROLE_ASSISTANT" and whole.message.content
    assert whole.usage.prompt_tokens > 0 and 1 <= whole.usage.completion_tokens <= 24

    pieces = list(
        server.call("sluice.v1.ChatService", "StreamChatCompletion", {"parameters": parameters(model)})
    )
    assert "".join(piece.content_delta for piece in pieces) == whole.message.content
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[-1].finish_reason == whole.finish_reason != 0
    assert pieces[-1].usage == whole.usage
    for piece in pieces[:-1]:
        assert piece.finish_reason == 0 and not piece.HasField("usage")


def test_the_answer_is_the_one_rest_gives(server, model, base_url, api_key):
    import openai

    whole = server.call("sluice.v1.ChatService", "CreateChatCompletion", {"parameters": parameters(model)})
    with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
        rest = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me a short story about a river."}],
            temperature=0,
            max_tokens=24,
        )
    assert rest.choices[0].message.content == whole.message.content
    assert rest.usage.prompt_tokens == whole.usage.prompt_tokens
    assert rest.usage.completion_tokens == whole.usage.completion_tokens


def test_cancelling_a_stream_ends_it(server, model):
    stream = server.call(
        "sluice.v1.ChatService",
        "StreamChatCompletion",
        {"parameters": parameters(model, output_tokens_max=500)},
    )
    next(iter(stream))
    stream.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() == grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("method", ["CreateChatCompletion", "StreamChatCompletion"])
@pytest.mark.parametrize("key", [None, "sk-sluice-wrong"])
def test_keys_are_required(channel, model, key, method):
    error = refusal(Reflected(channel, key), parameters(model), method)
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    details = details_of(error)
    assert details["ErrorInfo"].reason == "invalid_api_key"
    assert details["RequestInfo"].request_id


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"messages": []}, "messages"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"output_tokens_max": 0}, "output_tokens_max"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"messages": [{"role": "ROLE_UNSPECIFIED", "content": "x"}]}, "messages"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_invalid_arguments_name_their_field(server, model, changes, field):
    error = refusal(server, parameters(model, **changes))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    violations = details_of(error)["BadRequest"].field_violations
    assert any(field in violation.field for violation in violations), violations
    assert all(violation.description for violation in violations)


def test_unknown_model(server):
    error = refusal(server, parameters("no-such-model"))
    assert error.code() == grpc.StatusCode.NOT_FOUND and "no-such-model" in error.details()
    assert details_of(error)["ErrorInfo"].reason == "model_not_found"


def test_a_prompt_over_the_context(server, model):
    long = [{"role": "ROLE_USER", "content": "a river " * 200_000}]
    error = refusal(server, parameters(model, messages=long))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert details_of(error)["ErrorInfo"].reason == "context_length_exceeded"


def test_no_credit(channel, broke_key, model):
    error = refusal(Reflected(channel, broke_key), parameters(model), "StreamChatCompletion")
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    details = details_of(error)
    assert details["ErrorInfo"].reason == "insufficient_quota"
    assert "RetryInfo" not in details, "coming back does not help"


def test_unknown_service_and_method_are_unimplemented(channel, api_key):
    for path in ("/sluice.v1.ChatService/NoSuchMethod", "/no.such.Service/Method"):
        call = channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=[("authorization", f"Bearer {api_key}")], timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, path
