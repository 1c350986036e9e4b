"""Models of one kind of prediction as models of another."""


def convert_prediction(predict_data, process, prediction):
    """Return the function `(noisy, time)` of another prediction by a model that predicts the data."""

    def predict(noisy, time):
        data = predict_data(noisy, time)
        noise = (noisy - process.alpha(time) * data) / process.sigma(time)
        return prediction.target(process, data, noise, time)

    return predict
