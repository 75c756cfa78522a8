"""The pictures of the docs: the demo, and the report on every kind of run, from really trained small models."""
