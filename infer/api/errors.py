"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The form of every error, for the description of the API."""

    error: ErrorFields


class ApiError(Exception):
    """What a client did wrong, or why it must wait."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """The status is an HTTP one; headers go into the answer."""
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer that tells it."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def overloaded(message: str, seconds: int) -> ApiError:
    """429: come again after so many seconds."""
    return ApiError(message, status=429, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def unavailable(message: str) -> ApiError:
    """503: not now."""
    return ApiError(message, status=503, code="unavailable", headers={"Retry-After": "5"})


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in this form, those of the framework too."""

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if isinstance(error.body, bytes) and first["loc"] == ("body",):
            return ApiError("expected a JSON object, with the header Content-Type: application/json").response()
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return ApiError(message[:500], param=param).response()

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(str(error.detail), status=error.status_code, headers=error.headers).response()


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
