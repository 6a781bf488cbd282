"""langchain-openai: invoke, stream, structured output, and a tool that must be called."""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


@tool
def look(city: str) -> str:
    """Looks up a city."""
    return city


model = ChatOpenAI(
    model="demo",
    base_url=f"{sys.argv[1]}/v1",
    api_key="none",
    temperature=0,
    max_tokens=64,
    max_retries=0,
)
said = model.invoke("What is the capital of France?")
assert "Paris" in said.content
assert said.usage_metadata["input_tokens"] > 5
assert (
    "".join(part.content for part in model.stream("What is the capital of France?")) == said.content
)
city = model.with_structured_output(City, method="json_schema").invoke("Is Paris a capital?")
assert isinstance(city, City)
called = model.bind_tools([look], tool_choice="required").invoke("Look up Paris.")
assert called.tool_calls[0]["name"] == "look"
assert isinstance(called.tool_calls[0]["args"]["city"], str)
