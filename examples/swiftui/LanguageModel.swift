// Unverified: no Mac runs edgetune's tests.

import CoreML
import Foundation

/// Turns text into token ids, without adding any, and back. README.md tells which libraries do that.
protocol TextTokenizer: Sendable {
    func encode(text: String) -> [Int32]
    func decode(tokens: [Int32]) -> String
}

/// An exported package, run token by token, with an adapter as inputs.
actor LanguageModel {
    let call: HowToCall
    private let folder: URL
    private let model: MLModel
    private let tokenizer: any TextTokenizer
    private var adapter: [String: MLFeatureValue] = [:]

    /// `folder` is what `edgetune export coreml` wrote. Compiling it takes a while: an app keeps the compiled copy.
    init(folder: URL, tokenizer: any TextTokenizer) async throws {
        call = try HowToCall(folder: folder)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndGPU
        configuration.functionName = call.functions.first
        let compiled = try await MLModel.compileModel(at: folder.appending(path: call.package))
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        self.folder = folder
        self.tokenizer = tokenizer
        if let file = call.adapter?.file {
            adapter = try AdapterFile(at: folder.appending(path: file)).inputs(for: call)
        }
    }

    /// Replaces the adapter, from the output of `edgetune export coreml --weights none`; the package stays the same.
    func useAdapter(at url: URL) throws {
        adapter = try AdapterFile(at: url).inputs(for: call)
    }

    /// Continues a text. Each element is the whole text so far, not the new part, because the end of a text may still
    /// change: an accent joins its letter, and tokenizers tidy spaces. The task that reads may be cancelled.
    nonisolated func stream(_ text: String, maxTokens: Int = 256, temperature: Float = 0.7) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.write(after: text, maxTokens: maxTokens, temperature: temperature) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Returns the largest difference to the logits in golden.json, which shows if this device computes what edgetune did, with the
    /// adapter that came with the package. As in `write`, the prompt is fed in chunks and the rest token by token.
    func largestDifferenceToGolden() throws -> Float {
        let golden = try Golden(folder: folder)
        let prompt = call.startIds + tokenizer.encode(text: call.golden.prompt)
        guard prompt == Array(golden.tokenIds.prefix(golden.promptTokens)) else {
            throw ModelFailure("The app's tokenizer finds other tokens than edgetune's.")
        }
        let state = model.makeState()
        var largest: Float = 0
        var length = 0
        while length < golden.tokenIds.count {
            let count = length < golden.promptTokens ? min(call.prefillTokens, golden.promptTokens - length) : 1
            let logits = try read(Array(golden.tokenIds[length..<length + count]), after: length, into: state)
            length += count
            for (candidate, expected) in zip(golden.topTokenIds[length - 1], golden.topLogits[length - 1]) {
                largest = max(largest, abs(logits[candidate] - expected))
            }
        }
        return largest
    }

    private func write(after text: String, maxTokens: Int, temperature: Float, show: @Sendable (String) -> Void) throws {
        let encoded = tokenizer.encode(text: text)
        let prompt = call.startIds + encoded
        guard !prompt.isEmpty, prompt.count < call.contextTokens else {
            throw ModelFailure("The text takes \(prompt.count) tokens; this model reads 1 to \(call.contextTokens - 1).")
        }
        let state = model.makeState()
        var length = 0
        var logits: [Float] = []
        while length < prompt.count {
            try Task.checkCancellation()
            let chunk = Array(prompt[length..<min(length + call.prefillTokens, prompt.count)])
            logits = try read(chunk, after: length, into: state)
            length += chunk.count
        }
        var written: [Int32] = []
        while written.count < maxTokens, length < call.contextTokens, !Task.isCancelled {
            let token = draw(from: logits, temperature: temperature)
            if call.stopIds.contains(token) { return }
            written.append(token)
            show(tokenizer.decode(tokens: encoded + written))
            logits = try read([token], after: length, into: state)
            length += 1
        }
    }

    /// Feeds a chunk to the model and returns the logits of the next token.
    private func read(_ tokens: [Int32], after length: Int, into state: MLState) throws -> [Float] {
        let ids = MLShapedArray(scalars: tokens, shape: [1, tokens.count])
        var inputs = adapter
        inputs["input_ids"] = MLFeatureValue(multiArray: MLMultiArray(ids))
        for (name, mask) in call.inputs where name != "input_ids" {
            inputs[name] = MLFeatureValue(multiArray: MLMultiArray(self.mask(mask, count: tokens.count, after: length)))
        }
        let output = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs), using: state)
        guard let logits = output.featureValue(for: "logits")?.shapedArrayValue(of: Float16.self) else {
            throw ModelFailure("The package gives no logits; export it again.")
        }
        return logits[0][tokens.count - 1].scalars.map(Float.init)
    }

    /// Returns the mask (1, 1, T, M): row t sees the positions up to its own, at most as many as its window.
    private func mask(_ mask: HowToCall.Input, count: Int, after length: Int) -> MLShapedArray<Float16> {
        let seen = Float16(mask.seen ?? 0), hidden = Float16(mask.hidden ?? -10000)
        let total = length + count
        let window = mask.window ?? total
        var scalars = [Float16](repeating: hidden, count: count * total)
        for row in 0..<count {
            let position = length + row
            for column in max(0, position - window + 1)...position {
                scalars[row * total + column] = seen
            }
        }
        return MLShapedArray(scalars: scalars, shape: [1, 1, count, total])
    }

    private func draw(from logits: [Float], temperature: Float) -> Int32 {
        let largest = logits.max() ?? 0
        guard temperature > 0 else { return Int32(logits.firstIndex(of: largest) ?? 0) }
        let weights = logits.map { exp(($0 - largest) / temperature) }
        var left = Float.random(in: 0..<1) * weights.reduce(0, +)
        for (token, weight) in weights.enumerated() {
            left -= weight
            if left < 0 { return Int32(token) }
        }
        return Int32(logits.count - 1)
    }
}
