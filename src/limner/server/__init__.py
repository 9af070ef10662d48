"""The HTTP service: who may use it, what it may reach, and the dialects that it speaks."""
