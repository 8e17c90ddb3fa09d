"""The unmodified `openai` SDK, as a newcomer would use it: only base URL and key are ours."""

import asyncio
import json
import urllib.request

import openai
import pytest

QUESTION = [{"role": "user", "content": "Tell me a short story about a river."}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(base_url, api_key):
    with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
        yield client


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_list_and_retrieve(client, model):
    listed = [entry for entry in client.models.list()]
    assert [entry.id for entry in listed] == [model]
    assert listed[0].object == "model" and listed[0].created > 0 and listed[0].owned_by
    assert client.models.retrieve(model) == listed[0]


def test_chat(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == model and answer.created > 0
    assert len(answer.choices) == 1 and answer.choices[0].index == 0
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_stream_is_the_same_answer_in_pieces(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, model, "chat.completion.chunk")
    }


def test_stream_helper(client, model):
    """`chat.completions.stream` accumulates snapshots, and takes an answer cut by its limit for a failure."""
    with client.chat.completions.stream(model=model, messages=QUESTION, stop=".", **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion()
    assert final.choices[0].message.content == "".join(deltas) != ""


def test_raw_response_headers(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, **GREEDY)
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse().choices[0].message.content


def test_text_completions(client, model):
    whole = client.completions.create(model=model, prompt="The river", **GREEDY)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    assert whole.choices[0].text and whole.choices[0].logprobs is None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    stream = client.completions.create(model=model, prompt="The river", stream=True, **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_async_chat_and_streams_side_by_side(base_url, api_key, model):
    async def ask(client, number):
        messages = [{"role": "user", "content": f"Question {number}: what is a sluice?"}]
        whole = await client.chat.completions.create(model=model, messages=messages, **GREEDY)
        pieces = []
        async for chunk in await client.chat.completions.create(
            model=model, messages=messages, stream=True, **GREEDY
        ):
            pieces.append(chunk)
        assert text_of(pieces) == whole.choices[0].message.content, number

    async def run():
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            await asyncio.gather(*(ask(client, number) for number in range(8)))

    asyncio.run(run())


def test_async_break_out_of_a_stream(base_url, api_key, model):
    """A client that stops reading closes cleanly, and the connection pool still works afterwards."""

    async def run():
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            stream = await client.chat.completions.create(
                model=model, messages=QUESTION, stream=True, temperature=0, max_tokens=500
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
            await stream.close()
            again = await client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
            assert again.choices[0].message.content

    asyncio.run(run())


def test_explicit_nulls_and_unknown_fields_are_accepted(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=2,
        temperature=None,
        top_p=None,
        stop=None,
        seed=None,
        user=None,
        tools=[],
        metadata={"team": "river"},
        extra_body={"a_field_of_next_year": {"x": 1}},
    )
    assert answer.usage.completion_tokens <= 2


def test_max_completion_tokens_is_max_tokens(client, model):
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_completion_tokens=3
    )
    assert answer.usage.completion_tokens <= 3


def test_content_parts(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    in_parts = client.chat.completions.create(model=model, messages=parts, **GREEDY)
    assert in_parts.choices[0].message.content == whole.choices[0].message.content
    assert in_parts.usage == whole.usage


def test_conversation(client, model):
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello. How can I help?"},
        {"role": "user", "content": "Tell me about rivers."},
    ]
    longer = client.chat.completions.create(model=model, messages=messages, **GREEDY)
    shorter = client.chat.completions.create(model=model, messages=messages[-1:], **GREEDY)
    assert longer.usage.prompt_tokens > shorter.usage.prompt_tokens


def test_seeded_sampling_repeats_and_differs(client, model):
    def sample(seed):
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=1.0, seed=seed, max_tokens=24
        )
        return answer.choices[0].message.content

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_stop_string_is_not_sent(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
    text = whole.choices[0].message.content
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    assert stop, "the answer is long enough to cut"
    cut = client.chat.completions.create(model=model, messages=QUESTION, stop=[stop], **GREEDY)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = list(
        client.chat.completions.create(model=model, messages=QUESTION, stop=stop, stream=True, **GREEDY)
    )
    assert text_of(streamed) == cut.choices[0].message.content


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


def test_json_schema_is_enforced(client, model):
    """A model this small would never hit the schema by itself: not at temperature 1.2."""
    for seed in range(5):
        answer = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            max_tokens=300,
            temperature=1.2,
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "strict": True, "schema": PERSON},
            },
        )
        assert answer.choices[0].finish_reason == "stop"
        person = json.loads(answer.choices[0].message.content)
        assert list(person) == ["name", "age", "colours"]
        assert len(person["name"]) <= 10 and 0 <= person["age"] <= 120
        assert 1 <= len(person["colours"]) <= 2 and set(person["colours"]) <= {"red", "green"}


def test_parse_helper_gives_typed_answers(client, model):
    import typing

    import pydantic

    class Answer(pydantic.BaseModel):
        mood: typing.Literal["good", "bad"]
        stars: typing.Literal[1, 2, 3]

    answer = client.chat.completions.parse(
        model=model, messages=QUESTION, max_tokens=100, response_format=Answer
    )
    parsed = answer.choices[0].message.parsed
    assert parsed.mood in ("good", "bad") and parsed.stars in (1, 2, 3)


def test_a_schema_that_cannot_be_enforced_is_refused(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model,
            messages=QUESTION,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "odd", "schema": {"if": {"type": "string"}, "then": {}}},
            },
        )
    assert caught.value.param == "response_format.json_schema.schema"


def test_log_probabilities(client, model):
    ask = {"model": model, "messages": QUESTION, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = client.chat.completions.create(**ask).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens), "greedy takes the likeliest"
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **ask):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed.extend(chunk.choices[0].logprobs.content)
    assert streamed == tokens

    choice = client.completions.create(model=model, prompt="The river", logprobs=2, **GREEDY).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset) == len(choice.logprobs.tokens)
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)


def test_logit_bias_and_penalties(client, model):
    def tokens(**change):
        answer = client.completions.create(
            model=model, prompt="The river", max_tokens=40, temperature=0, logprobs=0, **change
        )
        return answer.choices[0].logprobs.tokens

    forced = tokens(logit_bias={"300": 100})
    assert len(set(forced)) == 1, "a bias of 100 decides"
    plain = tokens(extra_body={"ignore_eos": True})
    varied = tokens(frequency_penalty=2, presence_penalty=2, extra_body={"ignore_eos": True})
    assert len(set(varied)) > len(set(plain)), "penalties make for other words"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 16}, "days": {"enum": [1, 2, 3]}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "strict": True,
            "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        },
    },
]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def check_call(call):
    assert call.id and call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert list(arguments) == ["city", "days"] and arguments["days"] in (1, 2, 3)
    else:
        assert call.function.name == "get_time" and arguments == {}


def test_tools_required_and_named(client, model):
    ask = {"model": model, "messages": WEATHER, "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    choice = client.chat.completions.create(tool_choice="required", **ask).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    check_call(choice.message.tool_calls[0])
    named = {"type": "function", "function": {"name": "get_time"}}
    choice = client.chat.completions.create(tool_choice=named, **ask).choices[0]
    assert choice.message.tool_calls[0].function.name == "get_time"
    choice = client.chat.completions.create(tool_choice="none", **ask).choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            tool_choice={"type": "function", "function": {"name": "nobody"}}, **ask
        )
    assert caught.value.param == "tool_choice.function.name"


def test_streamed_tool_calls_add_up(client, model):
    ask = {"model": model, "messages": WEATHER, "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    whole = client.chat.completions.create(tool_choice="required", **ask).choices[0].message.tool_calls[0]
    with client.chat.completions.stream(tool_choice="required", **ask) as stream:
        for _ in stream:
            pass
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
    check_call(call)
    assert call.function.arguments == whole.function.arguments
    chunks = list(client.chat.completions.create(tool_choice="required", stream=True, **ask))
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function.name
    assert all(d.id is None and d.function.name is None and d.index == 0 for d in deltas[1:])
    assert "".join(d.function.arguments for d in deltas) == whole.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_a_tool_goes_on(client, model):
    messages = [
        *WEATHER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=60)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert answer.usage.prompt_tokens > 20


def test_authentication_error(base_url, model):
    client = openai.OpenAI(base_url=base_url, api_key="sk-sluice-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model=model, messages=QUESTION)
    assert caught.value.status_code == 401 and caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_not_found_error(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert caught.value.code == "model_not_found" and "no-such-model" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_bad_request_errors(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "a river " * 200_000}], max_tokens=1
        )
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_early_errors_of_a_stream_are_http_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION, stream=True)


def test_no_credit_is_a_rate_limit_error_that_is_not_retried(base_url, broke_key, model):
    sent = []
    http = openai.DefaultHttpxClient()
    http.event_hooks = {"request": [sent.append], "response": []}
    with openai.OpenAI(base_url=base_url, api_key=broke_key, max_retries=2, http_client=http) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=model, messages=QUESTION)
    assert caught.value.status_code == 429 and caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(sent) == 1, "the SDK obeys x-should-retry: false"


def test_json_is_utf8_not_escaped_nonsense(base_url, api_key, model):
    """What a client without any SDK sees, byte for byte."""
    body = {"model": model, "messages": [{"role": "user", "content": "水 🌊 é"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        data=json.dumps(body, ensure_ascii=False).encode("utf-8"),
        headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.loads(answer.read().decode("utf-8"))["usage"]["prompt_tokens"] > 0
