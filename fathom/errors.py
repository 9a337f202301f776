"""The whole error tree. Everything a user can cause derives from `FathomError`.

    FathomError
    ├── ConfigError      a config.json (or a flag) that we cannot honour exactly
    ├── CheckpointError  a file or tensor of a checkpoint is missing, foreign or damaged
    │   └── FormatError  a stored number format cannot hold the values asked of it
    ├── PromptError      a conversation or prompt that cannot be rendered, or has bad token ids
    │   └── ContextError the prompt does not fit the context
    ├── SamplingError    sampling parameters outside their range
    ├── RequestError     an HTTP request that is refused, with its status
    └── TrainError       a training run that cannot start or resume

A message is one line: what is wrong, then what to do. The command line prints it and exits with 2.
"""


class FathomError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(FathomError):
    """A configuration names something unknown or asks for something that the model does not have."""


class CheckpointError(FathomError):
    """A checkpoint is incomplete, foreign or damaged; the message names the tensor and the file."""


class FormatError(CheckpointError):
    """A stored number format cannot hold the given values exactly."""


class PromptError(FathomError):
    """A prompt cannot be rendered or holds token ids that the model does not have."""


class ContextError(PromptError):
    """A prompt is longer than the context; the message has both numbers."""


class SamplingError(FathomError):
    """A sampling parameter is outside its range."""


class RequestError(FathomError):
    """A request over HTTP that is refused. status, type, code and param are those of the error bodies of api B.8.

    retry_after: seconds after which trying again makes sense, if it does.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: str | None = "invalid_request_error",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, str | None]:
        """What stands under `error` in an answer."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class TrainError(FathomError):
    """A training run cannot start, or cannot go on from what it finds."""
