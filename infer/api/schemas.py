"""What clients may send: the fields of OpenAI's API, and those that vLLM's clients add for sampling.

The invariant: no field is taken and ignored. One that is unknown is refused by its name; one that this server
cannot follow is refused unless its value asks for nothing; user, name, metadata, service_tier, safety_identifier,
prompt_cache_key and a message's type are notes by nature.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1 << 22)]


class Body(BaseModel):
    """Strict: a number is not taken for text, nor text for a number, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream says beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class StructuredOutputs(Body):
    """What a text must be, as vLLM's clients say it: one of these."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def _one(self):
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give one of json, regex, choice and grammar")
        return self


class Sampling(Body):
    """How tokens are chosen: fields that completions and chat share."""

    model: Text | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    # Beyond OpenAI's, as vLLM names them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=1024)] | None = None
    banned_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None  # no name of vLLM's
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, one or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true alone")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1024)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None


class TextPart(Body):
    """A part of a message: text is what this server reads."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text = ""
    annotations: list[Any] | None = None  # these two come back with what /v1/responses has answered
    logprobs: list[Any] | None = None


class FunctionCall(Body):
    """The function that a tool call names, its arguments as JSON text."""

    name: Text
    arguments: Text | dict[str, Any] = "{}"


class ToolCall(Body):
    """A call that an assistant made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a dialog."""

    type: Literal["text", "message"] | None = None
    role: Literal["system", "developer", "user", "assistant", "tool", "ipython", "function"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as llama_jax.chat takes it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        calls = [{"function": call.function.model_dump()} for call in self.tool_calls or ()]
        if content is None and not calls:
            raise ValueError(f"a message of role {self.role} has no content")
        return {"role": role, "content": content, "tool_calls": calls or None}


class FunctionSchema(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool on offer: a function."""

    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(Body):
    """A function by its name."""

    name: Text


class ToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer follows."""

    name: Text
    description: Text | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type json_schema, and only then")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true alone")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice is for requests with tools alone")
        return self


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Text | None = None
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None
    user: Text | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a dialog as chat would see it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[TokenId]


class ResponsesFormat(JsonSchema):
    """What the text of /v1/responses must be; schema and name go with json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None  # type: ignore[assignment]

    @property
    def as_chat(self) -> ResponseFormat:
        """The same as chat names it."""
        schema = JsonSchema(name=self.name or "", schema=self.schema_) if self.type == "json_schema" else None
        return ResponseFormat(type=self.type, json_schema=schema)


class ResponsesText(Body):
    """How /v1/responses shall write."""

    format: ResponsesFormat


class ResponsesToolChoice(Body):
    """The one function that must be called, as /v1/responses names it."""

    type: Literal["function"]
    name: Text


class ResponsesRequest(Body):
    """POST /v1/responses, without state."""

    model: Text | None = None
    input: Text | Annotated[list["ResponsesItem"], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    text: ResponsesText | None = None
    tools: Annotated[list["ResponsesTool"], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: None = None
    truncation: Literal["disabled"] | None = None
    stream: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class ResponsesMessage(Body):
    """A message of /v1/responses."""

    type: Literal["message"] = "message"
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class ResponsesTool(FunctionSchema):
    """A function on offer, as /v1/responses has it."""

    type: Literal["function"]


class ResponsesCall(Body):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class ResponsesOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[TextPart]
    id: Text | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


ResponsesItem = ResponsesMessage | ResponsesCall | ResponsesOutput
ResponsesRequest.model_rebuild()
