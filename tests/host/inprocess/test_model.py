"""The MODEL inside the host: every way a file is loaded, and what is refused."""


def test_the_stock_loader_gives_the_model(model, pack):
    assert isinstance(model.model, pack("nodes.host.model").OpenSora2Model)
    assert model.model.config.hidden_size == 96
