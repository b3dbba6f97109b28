from tools.make_model import copy_without_weights


def test_a_folder_is_copied_with_its_subfolders_and_without_weights(tmp_path):
    kept = ["config.json", "tokenizer.model", "2_Dense/config.json", "a/b/vocab.txt"]
    weights = ["model.safetensors", "model.safetensors.index.json", "2_Dense/model.safetensors"]
    weights += ["a/b/pytorch_model.bin", "a/x.pt", "a/x.pth", ".git/lfs/objects/00/0123"]
    for name in kept + weights:
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    for _ in range(2):  # the second time over the first
        copy_without_weights(tmp_path / "model", tmp_path / "deep" / "bare")
    bare = tmp_path / "deep" / "bare"
    copied = {str(file.relative_to(bare)) for file in bare.rglob("*") if file.is_file()}
    assert copied == set(kept)
    assert all((bare / name).read_text() == name for name in kept)
