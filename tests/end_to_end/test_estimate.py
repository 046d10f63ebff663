"""`nanovllm estimate`: for a person and for tools."""

import json

from nanovllm_core.cli import main


def test_the_estimate_of_a_recipe(folder, capsys):
    arguments = ["estimate", str(folder / "recipe.yaml"), "--set", "train.freeze=model.layers.*"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "total" in told
    assert "with train.gradient_checkpointing: true the total is" in told
    assert main([*arguments, "--json"]) == 0
    frozen = json.loads(capsys.readouterr().out)
    assert main([*arguments[:2], "--json"]) == 0
    all_trained = json.loads(capsys.readouterr().out)
    assert frozen["weights"] == all_trained["weights"]
    layers = all_trained["gradients"] - frozen["gradients"]
    assert 0 < layers < all_trained["gradients"]
    assert all_trained["optimizer"] - frozen["optimizer"] == 2 * layers
    assert frozen["total"] == max(frozen["moments"].values()) < all_trained["total"]
