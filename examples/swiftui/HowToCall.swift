// Unverified: no Mac runs edgetune's tests.

import Foundation

/// The content of how-to-call.json, which is next to the package.
struct HowToCall: Decodable {
    /// The numbers of a mask; nil for input_ids.
    struct Input: Decodable {
        let seen: Float?
        let hidden: Float?
        let window: Int?
    }

    /// The text with which golden.json begins.
    struct GoldenText: Decodable {
        let prompt: String
    }

    struct Adapter: Decodable {
        let file: String
        let inputs: [String: [Int]]
    }

    let package: String
    let base: String
    let functions: [String]
    let contextTokens: Int
    let prefillTokens: Int
    let inputs: [String: Input]
    let adapter: Adapter?
    let startIds: [Int32]
    let stopIds: [Int32]
    let chatTemplate: String?
    let golden: GoldenText

    enum CodingKeys: String, CodingKey {
        case package = "package"
        case base = "base"
        case functions = "functions"
        case contextTokens = "context_tokens"
        case prefillTokens = "prefill_tokens"
        case inputs = "inputs"
        case adapter = "adapter"
        case startIds = "start_ids"
        case stopIds = "stop_ids"
        case chatTemplate = "chat_template"
        case golden = "golden"
    }

    init(folder: URL) throws {
        let data = try Data(contentsOf: folder.appending(path: "how-to-call.json"))
        self = try JSONDecoder().decode(HowToCall.self, from: data)
    }
}

/// The content of golden.json: tokens, and the highest logits at each position, from edgetune's own model.
struct Golden: Decodable {
    let promptTokens: Int
    let tokenIds: [Int32]
    let topTokenIds: [[Int]]
    let topLogits: [[Float]]

    enum CodingKeys: String, CodingKey {
        case promptTokens = "prompt_tokens"
        case tokenIds = "token_ids"
        case topTokenIds = "top_token_ids"
        case topLogits = "top_logits"
    }

    init(folder: URL) throws {
        let data = try Data(contentsOf: folder.appending(path: "golden.json"))
        self = try JSONDecoder().decode(Golden.self, from: data)
    }
}

/// An error, with a sentence for the user.
struct ModelFailure: LocalizedError {
    let errorDescription: String?

    init(_ sentence: String) {
        errorDescription = sentence
    }
}
