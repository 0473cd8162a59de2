"""The bodies of requests and responses, as in the OpenAPI description."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Text(BaseModel):
    """A text, or a pair of texts."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(examples=["a gorgeous , witty film"])
    pair: str | None = Field(None, description="the second text, for models of text pairs")


class PredictRequest(BaseModel):
    """Texts to predict."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="name of a model; default: the first one")
    inputs: list[Text] = Field(min_length=1)


class ExplainRequest(Text):
    """A text whose prediction to explain."""

    model: str | None = Field(None, description="name of a model; default: the first one")


class Prediction(BaseModel):
    """The prediction for one text or pair."""

    label: str | float | list[str] = Field(description="a class; the score; or the classes of a multi-label model")
    probability: float | None = Field(description="of the class; null for scores and several classes")
    probabilities: dict[str, float] = Field(description="of every class; empty for scores")
    n_tokens: int = Field(description="after truncation, including special tokens")
    truncated: bool
    lengths: list[int] = Field(description="number of positions of this text in each block")


class PredictResponse(BaseModel):
    """Predictions in the order of the inputs."""

    model: str
    milliseconds: float = Field(description="time in the server, waiting included")
    predictions: list[Prediction]


class Token(BaseModel):
    """A token and its share of the final [CLS] state."""

    text: str
    contribution: float
    start: int | None = Field(description="first character in the text, counted in Unicode code points; null: special token")
    end: int | None = Field(description="the character after the last one")
    segment: Literal[0, 1] = Field(description="0: text, 1: pair")


class Position(BaseModel):
    """A position of a block's output."""

    tokens: list[int] = Field(description="numbers of the tokens that are pooled into it")
    contribution: float


class ExplainResponse(BaseModel):
    """Attention rollout of one prediction."""

    model: str
    milliseconds: float
    prediction: Prediction
    tokens: list[Token] = Field(description="all tokens, including special ones")
    blocks: list[list[Position]]


class Model(BaseModel):
    """A model that is served."""

    name: str
    problem: Literal["classification", "regression", "multi-label"]
    labels: list[str]
    pairs: bool | None = Field(description="whether it takes pairs of texts; null: unknown, both are allowed")
    columns: list[str] = Field(description="names of the training texts' columns, if known")
    max_length: int = Field(description="longer texts are truncated to this number of tokens")
    blocks: str
    d_model: int
    parameters: int
    engine: Literal["pytorch", "onnx"]
    can_explain: bool


class Limits(BaseModel):
    """Limits of requests."""

    texts_per_request: int
    body_bytes: int
    file_bytes: int


class ModelsResponse(BaseModel):
    """The models, and the limits of requests."""

    models: list[Model]
    limits: Limits


class FileCreated(BaseModel):
    """An uploaded file."""

    id: str


class FileStatus(BaseModel):
    """The progress of a file."""

    status: Literal["queued", "running", "done", "failed"]
    done: int = Field(description="number of rows predicted")
    total: int = Field(description="number of rows; 0 until they have been counted")
    detail: str | None = Field(description="why it failed")


class ErrorResponse(BaseModel):
    """Any error."""

    detail: str = Field(description="what is wrong and what to do about it, on one line")
