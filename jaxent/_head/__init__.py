"""A classifier head in parts: chunks of classes, blocks of tokens, and where they lie on a mesh."""
