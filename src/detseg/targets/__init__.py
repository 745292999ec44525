"""Where truth meets the cells of a network: anchors, coders, matchers, samplers."""
