"""Other libraries' doors to partune, each imported by whoever wants it."""
