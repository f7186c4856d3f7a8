"""Expert layers: a router chooses K of E experts for each token; an expert kind is one file."""
