"""Receipts as a customer checks them: the openai SDK and gRPC hand them over, PyJWT verifies them."""

from decimal import Decimal

import grpc
import jwt
import openai
import pytest

from grpc_test import WAIT_S, Reflected, parameters

QUESTION = [{"role": "user", "content": "Tell me a short story about a river."}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def jwks(base_url):
    return jwt.PyJWKClient(base_url.removesuffix("/v1") + "/.well-known/sluice/jwks.json")


@pytest.fixture
def client(base_url, api_key):
    with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
        yield client


def verified(jwks, receipt: str) -> dict:
    key = jwks.get_signing_key_from_jwt(receipt)
    assert jwt.get_unverified_header(receipt)["typ"] == "sluice-receipt+jws"
    return jwt.decode(receipt, key, algorithms=["EdDSA"])


def assert_states(stated: dict, usage, cost: str, model: str):
    quantities = stated["quantities"]
    assert quantities["input_tokens"] + quantities["cached_input_tokens"] == usage.prompt_tokens
    assert quantities["output_tokens"] == usage.completion_tokens
    assert stated["cost"] == cost and Decimal(cost) > 0
    assert stated["model"] == model and stated["currency"] == "USD"


def test_a_whole_answer(client, jwks, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, **GREEDY)
    answer = raw.parse()
    stated = verified(jwks, raw.headers["x-sluice-receipt"])
    assert_states(stated, answer.usage, raw.headers["x-sluice-cost-usd"], model)
    assert stated["request_id"] == raw.request_id
    assert stated["finish_reason"] == answer.choices[0].finish_reason


def test_a_stream(client, jwks, model):
    options = {"include_usage": True, "include_cost": True}
    with client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options=options, **GREEDY
    ) as stream:
        chunks = list(stream)
    extension = chunks[-1].model_extra["sluice"]
    assert_states(verified(jwks, extension["receipt"]), chunks[-1].usage, extension["cost_usd"], model)
    so_far = [
        Decimal(chunk.model_extra["sluice"]["cost_usd_so_far"])
        for chunk in chunks
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert so_far == sorted(so_far) and so_far[-1] <= Decimal(extension["cost_usd"])


def test_the_stream_helper_takes_no_offence(client, jwks, model):
    with client.chat.completions.stream(
        model=model, messages=QUESTION, stop=".", stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
    final = stream.get_final_completion()
    extension = chunks[-1].model_extra["sluice"]
    assert_states(verified(jwks, extension["receipt"]), final.usage, extension["cost_usd"], model)


def test_a_stream_of_text(client, jwks, model):
    with client.completions.create(model=model, prompt="The river", stream=True, **GREEDY) as stream:
        last = list(stream)[-1]
    assert last.choices[0].finish_reason
    stated = verified(jwks, last.model_extra["sluice"]["receipt"])
    assert stated["cost"] == last.model_extra["sluice"]["cost_usd"]


@pytest.mark.parametrize("method", ["CreateChatCompletion", "StreamChatCompletion"])
def test_grpc_trailers(grpc_target, api_key, jwks, model, method):
    with grpc.insecure_channel(grpc_target) as channel:
        server = Reflected(channel, api_key)
        descriptor = server.pool.FindServiceByName("sluice.v1.ChatService").FindMethodByName(method)
        request = server.message(descriptor.input_type.full_name, parameters=parameters(model))
        response = type(server.message(descriptor.output_type.full_name))
        kind = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        stub = kind(
            f"/sluice.v1.ChatService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        if descriptor.server_streaming:
            call = stub(request, metadata=server.metadata, timeout=WAIT_S)
            usage = list(call)[-1].usage
        else:
            answer, call = stub.with_call(request, metadata=server.metadata, timeout=WAIT_S)
            usage = answer.usage
        assert call.code() == grpc.StatusCode.OK
        trailers = dict(call.trailing_metadata())
        assert "x-sluice-receipt" not in dict(call.initial_metadata())
    assert usage.cost_usd == trailers["x-sluice-cost-usd"]
    assert_states(verified(jwks, trailers["x-sluice-receipt"]), usage, usage.cost_usd, model)


def test_a_forgery_is_found(client, jwks, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, **GREEDY)
    receipt = raw.headers["x-sluice-receipt"]
    head, payload, signature = receipt.split(".")
    stated = jwt.utils.base64url_decode(payload).replace(b'"cost":"0.', b'"cost":"1.')
    forged = f"{head}.{jwt.utils.base64url_encode(stated).decode()}.{signature}"
    assert forged != receipt
    with pytest.raises(jwt.InvalidSignatureError):
        verified(jwks, forged)
