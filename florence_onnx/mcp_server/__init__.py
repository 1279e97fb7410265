"""The tasks as tools of an MCP server, for assistants that call tools.

In: calls of the Model Context Protocol over standard input. Out: fal's JSON as structured content, and the annotated image where it
is asked for. `tools.make_server` builds the server around one model. Called by `commands.mcp` alone; needs the extra `[mcp]`.
"""
