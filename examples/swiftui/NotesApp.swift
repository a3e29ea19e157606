// Unverified: no Mac runs edgetune's tests.

import SwiftUI

/// Holds a text, and that text continued by the model.
@MainActor
@Observable
final class Writer {
    var text = "The Duchess"
    private(set) var answer = ""
    private(set) var failure: String?
    private(set) var running: Task<Void, Never>?
    private let model: LanguageModel

    init(model: LanguageModel) {
        self.model = model
    }

    func start() {
        answer = ""
        failure = nil
        running = Task {
            do {
                for try await longer in model.stream(text) {
                    answer = longer
                }
            } catch {
                failure = error.localizedDescription
            }
            running = nil
        }
    }

    func stop() {
        running?.cancel()
    }
}

struct WriterView: View {
    @State var writer: Writer

    var body: some View {
        VStack(alignment: .leading) {
            TextField("Text to continue", text: $writer.text, axis: .vertical)
                .textFieldStyle(.roundedBorder)
            ScrollView {
                Text(writer.failure ?? writer.answer)
                    .foregroundStyle(writer.failure == nil ? .primary : .secondary)
                    .frame(maxWidth: .infinity, alignment: .leading)
                    .textSelection(.enabled)
            }
            if writer.running == nil {
                Button("Write", action: writer.start)
            } else {
                Button("Stop", action: writer.stop)
            }
        }
        .padding()
    }
}
