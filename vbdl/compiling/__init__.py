"""The compiler: traces modules into graphs, rewrites the graphs and compiles them."""
